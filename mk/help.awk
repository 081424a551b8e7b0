# Prints the targets of make files by section, in the order that `order` names the sections ("First|Second|...").
#
# A line "##@ NAME" opens a section; a line "TARGET: ... ## TEXT" is a target of it. A target outside of the sections
# that `order` names is an error, so that none is left out.
function fail(what) {
  printf "help: error: %s:%d: %s\n", FILENAME, FNR, what > "/dev/stderr"
  failed = 1
  exit 1
}

BEGIN {
  count = split(order, names, "|")
  for (i = 1; i <= count; i++) known[names[i]] = 1
}

FNR == 1 { section = "" }

/^##@ / {
  section = substr($0, 5)
  if (!(section in known)) fail("section " section " is not in the list of sections")
}

/^[a-z-]+:.*## / {
  if (section == "") fail("a target stands before the first section")
  target = $0
  sub(/:.*/, "", target)
  text = $0
  sub(/^.*## /, "", text)
  lines[section] = lines[section] sprintf("  %-18s %s\n", target, text)
}

END {
  if (failed) exit 1
  for (i = 1; i <= count; i++) if (lines[names[i]] != "") printf "\n%s\n%s", names[i], lines[names[i]]
}
