#!/bin/sh
# Redis with three users, none of whom may do more than its work: `publisher` (the jobs), `reader` (the serving process and whoever
# looks vectors up), `srs` (reads, and pushes histories). Nobody comes in without a password, and only the publisher moves the pointer.
# A key of Feast begins with 12 bytes, then the name of its first entity: those of histories are `????????????user_id…`.
set -eu
users="${REDIS_USERS:-/tmp/users.acl}"
hash() { printf %s "$1" | sha256sum | cut -d" " -f1; }
connects="+ping +hello +auth +select +client|setname"
reads="+hget +hmget +hgetall +hexists +exists"
umask 077
cat > "$users" <<END
user default off
user publisher on #$(hash "$REDIS_PASSWORD") ~* resetchannels -@all +@read +@write +@transaction +@connection -@dangerous -@blocking +wait +info
user reader on #$(hash "$REDIS_READER_PASSWORD") %R~* resetchannels -@all $connects $reads
user srs on #$(hash "$REDIS_SRS_PASSWORD") %R~* %RW~????????????user_id* resetchannels -@all $connects $reads +hset +expire
END
exec redis-server --aclfile "$users" "$@"
