-- KEYS: the kind by creation, the kind by expiry
-- ARGV: what the documents' keys begin with, 'first' or 'after', document id, limit, 'newest' (first) or 'oldest'
-- Returns {'ok', document id, record, ...} or {'missing'} if it is to begin behind a document that is not there.
local newest = ARGV[5] == 'newest'
local limit = tonumber(ARGV[4])
local start = 0
if ARGV[2] == 'after' then
  local rank = redis.call(newest and 'ZREVRANK' or 'ZRANK', KEYS[1], ARGV[3])
  if not rank or redis.call('EXISTS', ARGV[1] .. ARGV[3]) == 0 then return {'missing'} end
  start = rank + 1
end
local reply, num_found, expired = {'ok'}, 0, {}
while num_found < limit do
  local stop = start + limit - 1
  local ids = newest and redis.call('ZRANGE', KEYS[1], start, stop, 'REV') or redis.call('ZRANGE', KEYS[1], start, stop)
  if #ids == 0 then break end
  start = start + #ids
  for _, id in ipairs(ids) do
    local record = redis.call('HGET', ARGV[1] .. id, 'record')
    if not record then
      expired[#expired + 1] = id
    elseif num_found < limit then
      num_found = num_found + 1
      reply[#reply + 1] = id
      reply[#reply + 1] = record
    end
  end
end
for _, id in ipairs(expired) do
  redis.call('ZREM', KEYS[1], id)
  redis.call('ZREM', KEYS[2], id)
end
return reply
