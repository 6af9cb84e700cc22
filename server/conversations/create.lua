-- ARGV: call id, head record, chain, number of tokens, request id, time to live, time a tombstone lasts,
--       then the turn record and the reply id of each entry that the log begins with
-- Returns {'ok'}, {'alive'} (the id is taken) or {'expired'}.
local now = now_ms()
if redis.call('HGET', KEYS[1], 'created_by') == ARGV[1] then return {'ok'} end -- done; the reply was lost
local found = existence(now)
if found ~= 'missing' then return {found} end
redis.call('HSET', KEYS[1], 'created_by', ARGV[1], 'head', ARGV[2], 'version', (#ARGV - 7) / 2, 'chain', ARGV[3],
  'num_tokens', ARGV[4], 'request_id', ARGV[5], 'ttl_ms', ARGV[6], 'expires_at', now + ARGV[6], 'fence', 0)
for i = 8, #ARGV, 2 do append(ARGV[i], ARGV[i + 1], (i - 6) / 2) end
live(ARGV[6] + ARGV[7])
return {'ok'}
