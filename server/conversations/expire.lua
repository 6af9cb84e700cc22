-- ARGV: time a tombstone lasts
-- Returns {'ok', the checkpoint records that nothing points to any more ...}.
local expires_at = redis.call('HGET', KEYS[1], 'expires_at')
if existence(now_ms()) ~= 'expired' or expires_at == '0' then return {'ok'} end
local reply = {'ok'}
for record in pairs(checkpoints()) do reply[#reply + 1] = record end
bury(expires_at + ARGV[1])
return reply
