-- ARGV: fence
-- Returns {'ok'}, also when the lease was lost already.
if redis.call('HGET', KEYS[1], 'fence') == ARGV[1] then
  redis.call('HDEL', KEYS[1], 'lease_until', 'leased_by', 'owner')
end
return {'ok'}
