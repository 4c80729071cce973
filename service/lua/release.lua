-- A held edit joins the cumulative set again, in the place of those that it superseded and a rollback brought back.
if field(payload.id, 'status') ~= 'held' then return cjson.encode({refused = field(payload.id, 'status')}) end
move(payload.id, 'queued', {attempts = 0, run = '', error = '', superseded_by = '', accepted_at = context.now})
supersede_others(payload.id)
audit('edit.released', {id = payload.id})
redis.call('DEL', keys.hold)
return '{}'
