-- ARGV: metadata record, time to live (either empty: left as it is), time a tombstone lasts
-- Returns {'ok', the hash}, {'missing'} or {'expired'}.
local now = now_ms()
local found = existence(now)
if found ~= 'alive' then return {found} end
if ARGV[1] ~= '' then redis.call('HSET', KEYS[1], 'metadata', ARGV[1]) end
if ARGV[2] ~= '' then
  redis.call('HSET', KEYS[1], 'ttl_ms', ARGV[2], 'expires_at', now + ARGV[2])
  live(ARGV[2] + ARGV[3])
end
return {'ok', redis.call('HGETALL', KEYS[1])}
