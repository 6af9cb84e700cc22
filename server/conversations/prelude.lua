-- What every script begins with. Redis runs a script as one step: nothing else is seen or done in between.
--
-- The keys of a script on a conversation:
-- KEYS[1]  hash: the conversation's head, its lease, and when it expires; a tombstone holds only expires_at = 0
-- KEYS[2]  list: its turns, version 1 first
-- KEYS[3]  hash: from a reply's id to the version of its turn
--
-- Times are milliseconds of this server's clock; no client's clock decides anything.

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- 'missing', 'expired' or 'alive'. A conversation outlives its lease: none expires under a running turn.
local function existence(now)
  local times = redis.call('HMGET', KEYS[1], 'expires_at', 'lease_until')
  if not times[1] then return 'missing' end
  if math.max(tonumber(times[1]), tonumber(times[2] or 0)) <= now then return 'expired' end
  return 'alive'
end

-- Says whether the lease of that fence is current: neither ended, nor given back, nor taken over.
local function is_leased(fence, now)
  local lease = redis.call('HMGET', KEYS[1], 'fence', 'lease_until')
  return lease[1] == fence and lease[2] and tonumber(lease[2]) > now
end

-- Adds one entry to the log, and its reply, if it has one, to the index.
local function append(turn, reply_id, version)
  redis.call('RPUSH', KEYS[2], turn)
  if reply_id ~= '' then redis.call('HSET', KEYS[3], reply_id, version) end
end

-- Lets all keys live for that long from now on.
local function live(ms)
  for _, key in ipairs(KEYS) do redis.call('PEXPIRE', key, ms) end
end

-- Leaves nothing of the conversation but the fact that it existed, until the time given.
local function bury(until_ms)
  redis.call('UNLINK', unpack(KEYS))
  redis.call('HSET', KEYS[1], 'expires_at', 0)
  redis.call('PEXPIREAT', KEYS[1], until_ms)
end

-- Gives the only checkpoint of format 1 a name with its version.
local function name_only_checkpoint()
  local only = redis.call('HMGET', KEYS[1], 'checkpoint', 'checkpoint_version')
  if only[1] then redis.call('HSET', KEYS[1], 'checkpoint:' .. only[2], only[1]) end
  if only[2] then redis.call('HDEL', KEYS[1], 'checkpoint', 'checkpoint_version') end
end

-- The set of the recorded checkpoints.
local function checkpoints()
  local fields, known = redis.call('HGETALL', KEYS[1]), {}
  for i = 1, #fields, 2 do
    if fields[i] == 'checkpoint' or string.sub(fields[i], 1, 11) == 'checkpoint:' then known[fields[i + 1]] = true end
  end
  return known
end
