-- Parts of queries, put together by `queue/listing.py`: one filter for messages, log lines and dead letters.

-- name: message_matches
-- What is null asks for nothing. $13 and $14 are a range of time, which each list reads in its own way.
m.account_id = $1
  and ($2::bigint[] is null or (m.id, m.salt) in (select * from unnest($2::bigint[], $3::bigint[])))
  and ($4::text[] is null or m.url = any($4::text[]))
  and ($5::text[] is null or m.host = any($5::text[])
       or lower(substring(m.url from '^[^:]+://(?:[^/?#@]*@)?([^/?#]*)')) = any($5::text[]))
  and ($6::text[] is null
       or coalesce(nullif(substring(m.url from '^[^:]+://[^/?#]*([^?#]*)'), ''), '/') = any($6::text[]))
  and ($7::text[] is null or m.topic = any($7::text[]))
  and ($8::text[] is null or m.schedule_id = any($8::text[]))
  and ($9::text[] is null or m.queue = any($9::text[]))
  and ($10::text[] is null or m.labels && $10::text[])
  and ($11::text[] is null or m.flow_id = any(array(
    select g.id from gate g where g.account_id = $1 and g.kind = 'flow' and g.name = any($11::text[]))))
  and ($12::text[] is null or m.caller_ip = any($12::text[]))
