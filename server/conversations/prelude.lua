-- What every script begins with. Redis runs a script as one step: nothing else is seen or done in between.
--
-- KEYS[1]  hash: the conversation's head, its lease, and when it expires; a tombstone holds only expires_at = 0
-- KEYS[2]  list: its turns, version 1 first
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

-- Leaves nothing of the conversation but the fact that it existed, until the time given.
local function bury(until_ms)
  redis.call('UNLINK', KEYS[1], KEYS[2])
  redis.call('HSET', KEYS[1], 'expires_at', 0)
  redis.call('PEXPIREAT', KEYS[1], until_ms)
end
