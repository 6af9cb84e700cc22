-- ARGV: time a tombstone lasts
-- Returns {'ok', the hash as it was}, {'missing'} or {'expired'}.
local now = now_ms()
local found = existence(now)
if found ~= 'alive' then return {found} end
local head = redis.call('HGETALL', KEYS[1])
bury(now + ARGV[1])
return {'ok', head}
