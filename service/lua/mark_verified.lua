-- A run's version passed. Only for the run under way, and not once it is rejected, or missing: whoever ended the one or
-- did the other has judged the version.
if redis.call('GET', keys.current) ~= payload.run then return '{"refused":"run"}' end
local known = cjson.decode(redis.call('GET', keys.version .. payload.version))
if known.state == 'rejected' or known.state == 'missing' then return '{"refused":"state"}' end
redis.call('SET', keys.version .. payload.version, payload.record)
if known.state ~= 'verified' then count('errata_versions_judged_total|verified') end
return '{}'
