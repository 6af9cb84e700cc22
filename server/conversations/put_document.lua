-- KEYS: document, its kind by creation, its kind by expiry
-- ARGV: call id, document id, record, time of creation, time to live, 'absent' (written only where there is none) or 'any'
-- Returns {'ok'} or {'taken'}.
local now = now_ms()
local written_by = redis.call('HGET', KEYS[1], 'written_by')
if written_by == ARGV[1] then return {'ok'} end -- done; the reply was lost
if written_by and ARGV[6] == 'absent' then return {'taken'} end
redis.call('HSET', KEYS[1], 'written_by', ARGV[1], 'record', ARGV[3])
redis.call('ZADD', KEYS[2], ARGV[4], ARGV[2])
redis.call('ZADD', KEYS[3], now + ARGV[5], ARGV[2])
redis.call('PEXPIREAT', KEYS[1], now + ARGV[5])
for i = 2, 3 do
  if redis.call('PTTL', KEYS[i]) < tonumber(ARGV[5]) then redis.call('PEXPIREAT', KEYS[i], now + ARGV[5]) end
end
-- Each document that comes takes the names of some that have expired with it: the sets do not grow for ever.
local expired = redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', now, 'LIMIT', 0, 16)
if #expired > 0 then
  redis.call('ZREM', KEYS[2], unpack(expired))
  redis.call('ZREM', KEYS[3], unpack(expired))
end
return {'ok'}
