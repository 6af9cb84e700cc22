-- KEYS: document, its kind by creation, its kind by expiry
-- ARGV: document id
-- Returns {'ok', 1 if there was one, else 0}.
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('ZREM', KEYS[3], ARGV[1])
return {'ok', redis.call('UNLINK', KEYS[1])}
