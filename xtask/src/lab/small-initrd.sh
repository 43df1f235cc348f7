#!/bin/busybox sh
# The first process of the small disk's initrd: loads modules, finds the root file system, and hands over to it.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for module in $(cat /lab/modules); do
    insmod "/lab/$module" || echo "GUEST no module $module"
done
for word in $(cat /proc/cmdline); do
    case $word in root=*) root=${word#root=} ;; esac
done
until device=$(findfs "$root" 2>/dev/null); do usleep 10000; done
mount -t ext4 -o ro "$device" /root
for folder in proc sys dev; do mount --move "/$folder" "/root/$folder"; done
exec switch_root /root /sbin/init
