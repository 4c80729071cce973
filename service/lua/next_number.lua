-- A number that no version had or will have, also if Redis forgot what it gave. Only for the run under way.
if not holds(payload.run, payload.token) then return '{"refused":"fenced"}' end
local number = math.max(tonumber(redis.call('GET', keys.version_seq) or '0'), payload.above) + 1
redis.call('SET', keys.version_seq, number)
return cjson.encode({number = number})
