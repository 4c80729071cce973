-- Keeps what nodes answered to the edits of a run's version. Of an edit that is live by then, or another run's, a publisher
-- that slept has nothing to say any more.
for id, answered in pairs(payload.edits) do
  if field(id, 'run') == payload.run then
    redis.call('HSET', keys.edit .. id, 'verified', answered.verified, 'verdict', answered.verdict)
  end
end
return '{}'
