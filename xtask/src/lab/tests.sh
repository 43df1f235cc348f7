#!/bin/busybox sh
# The named test programs that need KVM, or all of them, one after the other; fails when one of them fails, after all have run.
failed=
cd /lab/target/debug/deps
for program in ${@:-*}; do
    echo "LAB tests of $program"
    began=$(cut -d. -f1 /proc/uptime)
    "./$program" --test-threads 1 || failed="$failed $program"
    ended=$(cut -d. -f1 /proc/uptime)
    entries="$entries${entries:+,}\"$program\":$((ended - began))"
done
echo "{\"seconds\":{$entries},\"failed\":\"$failed\"}" > "$LAB_DETAILS"
test -z "$failed"
