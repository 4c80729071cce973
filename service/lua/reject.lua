-- A version that failed cannot become active; if it was the canary, it answers nobody any more.
local known = cjson.decode(redis.call('GET', keys.version .. payload.version))
redis.call('SET', keys.version .. payload.version, payload.record)
if known.state ~= 'rejected' then count('errata_versions_judged_total|rejected') end
if tonumber(redis.call('HGET', keys.active, 'canary')) == payload.version then end_canary('withdrawn', payload.reason) end
return '{}'
