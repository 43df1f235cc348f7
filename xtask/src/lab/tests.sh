#!/bin/busybox sh
# All test programs that need KVM, one after the other; fails when one of them fails, after all have run.
failed=
for program in /lab/target/debug/deps/*; do
    echo "LAB tests of $(basename "$program")"
    began=$(cut -d. -f1 /proc/uptime)
    "$program" --test-threads 1 || failed="$failed $(basename "$program")"
    ended=$(cut -d. -f1 /proc/uptime)
    entries="$entries${entries:+,}\"$(basename "$program")\":$((ended - began))"
done
echo "{\"seconds\":{$entries},\"failed\":\"$failed\"}" > "$LAB_DETAILS"
test -z "$failed"
