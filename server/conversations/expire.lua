-- ARGV: time a tombstone lasts
-- Returns {'ok', the checkpoint record that nothing points to any more}; none when there is no such record.
local head = redis.call('HMGET', KEYS[1], 'expires_at', 'checkpoint')
local expires_at = tonumber(head[1])
if not expires_at or expires_at == 0 or expires_at > now_ms() then return {'ok'} end
bury(expires_at + ARGV[1])
return {'ok', head[2] or nil}
