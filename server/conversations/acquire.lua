-- ARGV: call id, owner, lease's time to live
-- Returns {'ok', fence, the hash}, {'busy', milliseconds left}, {'missing'} or {'expired'}.
local now = now_ms()
local found = existence(now)
if found ~= 'alive' then return {found} end
local lease = redis.call('HMGET', KEYS[1], 'lease_until', 'leased_by')
local is_mine = lease[2] == ARGV[1] -- granted to this very call; the reply was lost
if lease[1] and tonumber(lease[1]) > now and not is_mine then return {'busy', lease[1] - now} end
local fence = redis.call('HINCRBY', KEYS[1], 'fence', 1)
redis.call('HSET', KEYS[1], 'leased_by', ARGV[1], 'owner', ARGV[2], 'lease_until', now + ARGV[3])
return {'ok', fence, redis.call('HGETALL', KEYS[1])}
