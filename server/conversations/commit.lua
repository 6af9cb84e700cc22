-- Appends the turn and ends the lease.
-- ARGV: fence, version, chain, number of tokens, request id, turn record, reply id, time a tombstone lasts
-- Returns {'ok'}, {'lost'}, {'conflict', version} or {'corrupt'}. Nothing is written unless it is 'ok'.
local now = now_ms()
local head = redis.call('HMGET', KEYS[1], 'version', 'chain', 'request_id', 'ttl_ms')
if head[1] == ARGV[2] and head[2] == ARGV[3] and head[3] == ARGV[5] then return {'ok'} end -- the reply was lost
if not is_leased(ARGV[1], now) then return {'lost'} end
if head[1] + 1 ~= tonumber(ARGV[2]) then return {'conflict', tonumber(head[1])} end
if redis.call('LLEN', KEYS[2]) ~= tonumber(head[1]) then return {'corrupt'} end
append(ARGV[6], ARGV[7], ARGV[2])
redis.call('HSET', KEYS[1], 'version', ARGV[2], 'chain', ARGV[3], 'num_tokens', ARGV[4], 'request_id', ARGV[5],
  'expires_at', now + head[4])
redis.call('HDEL', KEYS[1], 'lease_until', 'leased_by', 'owner')
live(head[4] + ARGV[8])
return {'ok'}
