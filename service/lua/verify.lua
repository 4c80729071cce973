-- A run's version passed. Only for the run under way: whoever ended it has judged its version.
if redis.call('GET', keys.current) ~= payload.run then return '{"refused":"run"}' end
local known = cjson.decode(redis.call('GET', keys.version .. payload.version))
redis.call('SET', keys.version .. payload.version, payload.record)
if known.state ~= 'verified' then count('errata_versions_judged_total|verified') end
return '{}'
