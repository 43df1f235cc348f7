#!/bin/busybox sh
# The first process of the small Linux guest: loads its modules, then does what is typed into its serial console.
/bin/busybox --install -s /bin
export PATH=/bin HOME=/tmp PS1=
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for module in $(cat /lab/modules); do
    insmod "/lab/$module" || echo "GUEST no module $module"
done
stty -echo < /dev/ttyS0
echo "GUEST ready"
while true; do
    setsid sh -c 'exec sh < /dev/ttyS0 > /dev/ttyS0 2>&1'
done
