-- ARGV: fence, lease's time to live
-- Returns {'ok'} or {'lost'}.
local now = now_ms()
if not is_leased(ARGV[1], now) then return {'lost'} end
redis.call('HSET', KEYS[1], 'lease_until', now + ARGV[2])
return {'ok'}
