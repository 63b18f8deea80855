#!/bin/sh
# Puts Keepwall on this machine and enrols it: `… | sh -s -- TOKEN`.
# Programs come from the server that the token names, over TLS that is pinned to its key.
set -eu

token=${1:?usage: sh -s -- TOKEN}
[ "$(id -u)" = 0 ] || { echo "This needs root." >&2; exit 1; }
case $(uname -s)-$(uname -m) in
Linux-x86_64) ;;
*) echo "There are programs for Linux on x86-64 only; this is $(uname -s) on $(uname -m)." >&2; exit 1 ;;
esac

# The token names the server and its key.
decoded=$(printf '%s' "${token#kw1.}" | tr '_-' '/+' | awk '{ n = length($0) % 4; if (n) for (i = n; i < 4; i++) $0 = $0 "="; print }' | base64 -d)
server=$(printf '%s\n' "$decoded" | sed -n 1p)
pin=$(printf '%s\n' "$decoded" | sed -n 4p)
[ -n "$server" ] && [ -n "$pin" ] || { echo "This is not a token of Keepwall." >&2; exit 1; }

directory=/usr/local/bin
for program in keepwall keepwall-agent keepwall-uplink; do
    echo "Fetching $program from $server"
    curl -fsS --insecure --pinnedpubkey "$pin" -o "$directory/.$program.new" "https://$server/install/$program"
    chmod 755 "$directory/.$program.new"
    mv "$directory/.$program.new" "$directory/$program"
done
exec "$directory/keepwall" enroll "$token"
