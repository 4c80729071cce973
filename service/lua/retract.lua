-- Takes an edit out of the cumulative set; a second time changes nothing.
if move(payload.id, 'retracting') then
  redis.call('DEL', keys.hold)
  audit('edit.retracted', {id = payload.id})
end
return '{}'
