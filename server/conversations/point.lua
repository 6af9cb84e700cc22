-- ARGV: version, chain, checkpoint record
-- Returns {'ok', the checkpoint record that nothing points to any more}; none when there is no such record.
local recorded = redis.call('HMGET', KEYS[1], 'checkpoint', 'checkpoint_version')
if recorded[1] == ARGV[3] then return {'ok'} end -- done; the reply was lost
if existence(now_ms()) ~= 'alive' or tonumber(ARGV[1]) <= tonumber(recorded[2]) then return {'ok', ARGV[3]} end
-- A state of another history (of turns that a failover has undone) must never become this conversation's.
local turn = redis.call('LINDEX', KEYS[2], ARGV[1] - 1)
if not turn or string.sub(turn, 1, 16) ~= ARGV[2] then return {'ok', ARGV[3]} end
redis.call('HSET', KEYS[1], 'checkpoint', ARGV[3], 'checkpoint_version', ARGV[1])
return {'ok', recorded[1] or nil}
