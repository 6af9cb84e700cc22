-- ARGV: call id, head record, chain, number of tokens, time to live, time a tombstone lasts
-- Returns {'ok'}, {'alive'} (the id is taken) or {'expired'}.
local now = now_ms()
if redis.call('HGET', KEYS[1], 'created_by') == ARGV[1] then return {'ok'} end -- done; the reply was lost
local found = existence(now)
if found ~= 'missing' then return {found} end
redis.call('HSET', KEYS[1], 'created_by', ARGV[1], 'head', ARGV[2], 'version', 0, 'chain', ARGV[3],
  'num_tokens', ARGV[4], 'ttl_ms', ARGV[5], 'expires_at', now + ARGV[5], 'checkpoint_version', 0, 'fence', 0)
redis.call('PEXPIRE', KEYS[1], ARGV[5] + ARGV[6])
return {'ok'}
