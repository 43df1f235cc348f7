#!/bin/sh
# What the DHCP client calls when it has got something.
case $1 in
bound | renew)
    ip addr add "$ip/$mask" dev "$interface"
    [ -z "$router" ] || ip route add default via "$router"
    ;;
esac
