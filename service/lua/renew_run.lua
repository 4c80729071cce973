-- Keeps the lease of the current run, as long as it is the holder's.
if redis.call('GET', keys.token) ~= tostring(payload.token) or redis.call('GET', keys.current) ~= payload.run then
  return '{"lost":true}'
end
redis.call('SET', keys.lease, payload.token, 'PX', payload.lease_ms)
return cjson.encode({cancel = redis.call('HGET', keys.run .. payload.run, 'cancel') == '1'})
