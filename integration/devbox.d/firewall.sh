# shellcheck shell=bash disable=SC2034,SC2154 # variables of ../devbox and the other parts
# iptables after CNI. The plugins make chains per container (CNI-<hash>, CNI-DN-<hash>), which they remove when
# they are asked to, and a few common ones, which they never remove.

firewall_commands() {
  local c
  for c in iptables ip6tables; do
    if command -v "$c-restore" >/dev/null; then echo "$c"; fi
  done
}

# What exists: "COMMAND TABLE" for each table, "COMMAND TABLE CHAIN" for each chain
firewall_save() {
  local c
  for c in $(firewall_commands); do
    "$c-save" | awk -v c="$c" '/^\*/ { t = substr($1, 2); print c, t } /^:/ { print c, t, substr($1, 2) }'
  done
}

# firewall_edit COMMAND TABLE: apply -D, -F and -X lines from stdin in one transaction
firewall_edit() {
  local lines; lines=$(cat)
  [[ -n $lines ]] || return 0
  printf '*%s\n%s\nCOMMIT\n' "$2" "$lines" | "$1-restore" -w --noflush ||
    say "warning: could not remove all of this devbox's rules from $1's table $2"
}

# This devbox's address ranges as text that rules contain: " 10.77." or " 10.4.1."
devbox_prefixes() {
  echo "$(saved net).0.0/16" | cat - <(conflist_values '.plugins[0].ipam.ranges[]?[]?.subnet // empty') |
    sed -nE 's#^([0-9]+\.[0-9]+\.)0\.0/16$#\1#p; s#^([0-9]+\.[0-9]+\.[0-9]+\.)[0-9]+/[0-9]+$#\1#p'
}

# Rules of this devbox's bridges, and of containers whose network was not taken down (a killed shim, a pod without crictl).
firewall_sweep() {
  local c table words
  words=$({ devbox_prefixes | sed 's/^/ /'; echo "$bridge_net"; echo "$bridge_pod"; conflist_values '.plugins[0].bridge // empty'; } |
    sed -E 's/^([a-z].*)$/ \1 /' | paste -sd'|')
  for c in $(firewall_commands); do
    for table in nat filter; do
      "$c-save" -t "$table" | awk -v words="$words" '
        function single(chain) { return chain ~ /^CNI-(DN-)?[0-9a-f]+$/ }
        function target(   i) { for (i = 1; i < NF; i++) if ($i == "-j") return $(i + 1); return "" }
        BEGIN { n = split(words, word, "|") }
        /^-A/ {
          rule[++rules] = $0; chain[rules] = $2; jump[rules] = target()
          for (i = 1; i <= n; i++) if (index($0 " ", word[i])) {
            ours[rules] = 1
            if (single($2)) gone[$2] = 1
            if (single(jump[rules])) gone[jump[rules]] = 1
          }
        }
        END {
          for (r = 1; r <= rules; r++)
            if (!(chain[r] in gone) && (r in ours || jump[r] in gone)) print "-D" substr(rule[r], 3)
          for (c in gone) print "-F " c
          for (c in gone) print "-X " c
        }' | firewall_edit "$c" "$table"
    done
  done
}

# For the last devbox that leaves: the common chains and the tables that were not there before the first one came.
firewall_restore() { # firewall_restore FILE-FROM-firewall_save
  local c table new
  new=$(firewall_save | awk 'FILENAME != "-" { old[$0] = 1; next } !($0 in old)' "$1" -)
  # chains of single containers, and not ours: somebody else uses the common ones by now
  if grep -qE ' CNI-(DN-)?[0-9a-f]+$' <<<"$new"; then return 0; fi
  for c in $(firewall_commands); do
    for table in nat filter; do
      "$c-save" -t "$table" | awk -v new="$(sed -n "s/^$c $table //p" <<<"$new" | paste -sd' ')" '
        BEGIN { n = split(new, list); for (i = 1; i <= n; i++) if (list[i] ~ /^CNI-/) gone[list[i]] = 1 }
        /^-A/ { for (i = 1; i < NF; i++) if ($i == "-j" && $(i + 1) in gone && !($2 in gone)) print "-D" substr($0, 3) }
        END { for (c in gone) print "-F " c; for (c in gone) print "-X " c }' | firewall_edit "$c" "$table"
    done
  done
  # iptables on nftables makes a table at its first use, even for reading, and keeps it
  local family
  while read -r c table; do
    if [[ $("$c" -V) != *nf_tables* ]] || ! command -v nft >/dev/null; then continue; fi
    if "$c-save" -t "$table" | grep -qE '^-A|^:[A-Z]+ DROP|^:[^ ]+ -'; then continue; fi
    "$c" -w -t "$table" -X
    family=ip; [[ $c == iptables ]] || family=ip6
    if [[ $(nft list table "$family" "$table" | wc -l) == 2 ]]; then nft delete table "$family" "$table"; fi
  done < <(awk 'NF == 2' <<<"$new")
}
