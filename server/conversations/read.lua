-- Returns {'ok', the hash}, {'missing'} or {'expired'}. No transaction of plain commands: a full Redis refuses those.
local found = existence(now_ms())
if found ~= 'alive' then return {found} end
return {'ok', redis.call('HGETALL', KEYS[1])}
