-- ARGV: fence, lease's time to live
-- Returns {'ok'} or {'lost'}.
local now = now_ms()
if not is_leased(ARGV[1], now) then return {'lost'} end
extend_lease(now, tonumber(ARGV[2]))
return {'ok'}
