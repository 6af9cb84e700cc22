-- ARGV: version, chain, checkpoint record, then the versions whose checkpoints are to be forgotten
-- Returns {'ok', the checkpoint records that nothing points to any more ...}.
local removed = {ARGV[3]}
-- A state of another history (of turns that a failover has undone) must never become this conversation's.
local turn = existence(now_ms()) == 'alive' and tonumber(ARGV[1]) > 0 and redis.call('LINDEX', KEYS[2], ARGV[1] - 1)
if turn and string.sub(turn, 1, 16) == ARGV[2] then
  local field = 'checkpoint:' .. ARGV[1]
  name_only_checkpoint()
  removed = {redis.call('HGET', KEYS[1], field) or nil}
  redis.call('HSET', KEYS[1], field, ARGV[3])
  for i = 4, #ARGV do
    local other = 'checkpoint:' .. ARGV[i]
    local record = other ~= field and redis.call('HGET', KEYS[1], other)
    if record then
      removed[#removed + 1] = record
      redis.call('HDEL', KEYS[1], other)
    end
  end
end
local reply, known = {'ok'}, checkpoints()
for _, record in ipairs(removed) do
  if not known[record] then
    known[record] = true
    reply[#reply + 1] = record
  end
end
return reply
