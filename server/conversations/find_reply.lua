-- ARGV: reply id
-- Returns {'ok', version, turn record}, {'ok'} if no entry has that reply, {'missing'}, {'expired'} or {'corrupt'}.
local found = existence(now_ms())
if found ~= 'alive' then return {found} end
local version = redis.call('HGET', KEYS[3], ARGV[1])
if not version then return {'ok'} end
local turn = redis.call('LINDEX', KEYS[2], version - 1)
if not turn then return {'corrupt'} end
return {'ok', tonumber(version), turn}
