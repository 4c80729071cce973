-- A run's version failed and cannot become active; if it was the canary, it answers nobody any more. Only for the run
-- under way, and not once it is active: whoever ended the one or did the other has judged the version.
if redis.call('GET', keys.current) ~= payload.run then return '{"refused":"run"}' end
if tonumber(redis.call('HGET', keys.active, 'version')) == payload.version then return '{"refused":"active"}' end
local known = cjson.decode(redis.call('GET', keys.version .. payload.version))
redis.call('SET', keys.version .. payload.version, payload.record)
if known.state ~= 'rejected' then count('errata_versions_judged_total|rejected') end
if tonumber(redis.call('HGET', keys.active, 'canary')) == payload.version then end_canary('withdrawn', payload.reason) end
return '{}'
