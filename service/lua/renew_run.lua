-- Keeps the lease of the current run, as long as it is the holder's.
if not holds(payload.run, payload.token) then return '{"lost":true}' end
redis.call('SET', keys.lease, payload.token, 'PX', payload.lease_ms)
return cjson.encode({cancel = redis.call('HGET', keys.run .. payload.run, 'cancel') == '1'})
