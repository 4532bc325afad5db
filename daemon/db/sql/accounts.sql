-- Accounts of the queue's API, their tokens and their signing keys.

-- name: account_add
insert into account (name, is_dev, limits, key_id, keys) values ($1, $2, $3, '', '') on conflict (name) do nothing
returning id

-- name: account_seal
update account set key_id = $2, keys = $3 where id = $1

-- name: account_limits
update account set limits = $2 where name = $1 returning id

-- name: account_named
select id, name, is_dev, limits from account where name = $1

-- name: account_of
select id, name, is_dev, limits from account where id = $1

-- name: account_list
select a.id, a.name, a.is_dev, a.limits, a.created_at,
  (select count(*) from token t where t.account_id = a.id and revoked_at is null) as tokens
from account a order by name

-- name: account_keys_lock
select key_id, keys from account where id = $1 for update

-- name: account_keys
select key_id, keys from account where id = $1

-- name: account_sealed
select id, key_id, keys from account order by id for update

-- name: account_sealed_all
select id, name, key_id, keys from account order by id

-- name: token_add
insert into token (account_id, name, hash, is_read_only) values ($1, $2, $3, $4)
on conflict (account_id, name) do update set
  hash = excluded.hash, is_read_only = excluded.is_read_only, created_at = now(), revoked_at = null
where token.revoked_at is not null or $5
returning id

-- name: token_list
select a.name as account, t.name, t.is_read_only, t.created_at, t.revoked_at
from token t join account a on a.id = t.account_id where revoked_at is null or $1 order by 1, 2

-- name: token_revoke
update token t set revoked_at = now() from account a
where a.id = t.account_id and a.name = $1 and t.name = $2 and t.revoked_at is null returning t.id

-- name: token_find
select a.id, a.name, a.is_dev, a.limits, t.is_read_only
from token t join account a on a.id = t.account_id where t.hash = $1 and t.revoked_at is null
