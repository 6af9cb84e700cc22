-- ARGV: time a tombstone lasts
-- Returns {'ok', the checkpoint record that nothing points to any more}; none when there is no such record.
local head = redis.call('HMGET', KEYS[1], 'expires_at', 'checkpoint')
if existence(now_ms()) ~= 'expired' or head[1] == '0' then return {'ok'} end
bury(head[1] + ARGV[1])
return {'ok', head[2] or nil}
