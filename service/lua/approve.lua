-- A proposed edit joins the cumulative set, in the place of the others of its prompt, if its proposer is somebody else.
if field(payload.id, 'status') ~= 'proposed' then return cjson.encode({refused = field(payload.id, 'status')}) end
if field(payload.id, 'proposer') == context.actor then return '{"own":true}' end
move(payload.id, 'queued', {accepted_at = context.now})
supersede_others(payload.id)
redis.call('SADD', keys.prompt .. field(payload.id, 'prompt_key'), payload.id)
audit('edit.approved', {id = payload.id, proposer = field(payload.id, 'proposer')})
redis.call('DEL', keys.hold)
return '{}'
