#!/bin/sh
# Runs inside of the new Debian while its disk is made: users, delegation, and nothing that is slow.
set -eu

# tester runs the tests; peer is somebody else. Homes are closed, as Debian's adduser makes them.
useradd -m -u 1000 -s /bin/bash tester
useradd -m -u 1001 -s /bin/bash peer
chmod 0700 /home/tester /home/peer
printf 'tester:100000:65536\npeer:165536:65536\n' >/etc/subuid
cp /etc/subuid /etc/subgid
mkdir -p /var/lib/systemd/linger
: >/var/lib/systemd/linger/tester

echo sandboxd-vm >/etc/hostname
printf '127.0.0.1 localhost sandboxd-vm\n::1 localhost\n' >/etc/hosts
: >/etc/fstab
: >/etc/machine-id
echo 'KERNEL=="fuse", MODE="0666"' >/etc/udev/rules.d/90-tests.rules
echo 'KERNEL=="tun", MODE="0666"' >>/etc/udev/rules.d/90-tests.rules
printf '%s\n' virtio_console virtio_net fuse tun overlay >/etc/modules-load.d/tests.conf
# Each of these modules costs emulated seconds and drives nothing that is there.
ln -s /dev/null /etc/udev/rules.d/80-drivers.rules
ln -s /dev/null /etc/udev/hwdb.bin

# Debian's own delegation to a user is cpu, memory and pids; `--stock` goes back to that.
mkdir -p /etc/systemd/system/user@.service.d
printf '[Service]\nDelegate=cpu cpuset io memory pids\n' \
    >/etc/systemd/system/user@.service.d/delegate.conf

mkdir -p /etc/systemd/journald.conf.d
printf '[Journal]\nStorage=volatile\nAudit=no\n' >/etc/systemd/journald.conf.d/vm.conf

mkdir -p /usr/local/lib/sandboxd-vm
mv /vm/loader.py /vm/site /usr/local/lib/sandboxd-vm/
cat >/etc/systemd/system/sandboxd-vm.service <<'END'
[Unit]
Description=takes a command from the second disk
Wants=user@1000.service
SuccessAction=poweroff-force
FailureAction=poweroff-force
After=user@1000.service systemd-logind.service dbus.service systemd-user-sessions.service
[Service]
ExecStart=/usr/bin/python3 -P /usr/local/lib/sandboxd-vm/loader.py
StandardOutput=journal+console
StandardError=journal+console
OOMScoreAdjust=-900
[Install]
WantedBy=multi-user.target
END
systemctl -q enable sandboxd-vm.service
systemctl -q set-default multi-user.target
systemctl -q mask getty@tty1.service serial-getty@ttyS0.service getty-static.service \
    apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
    e2scrub_reap.service fstrim.timer systemd-tmpfiles-clean.timer systemd-update-utmp.service \
    systemd-random-seed.service systemd-pstore.service systemd-binfmt.service \
    systemd-machine-id-commit.service systemd-firstboot.service ldconfig.service \
    modprobe@efi_pstore.service modprobe@drm.service systemd-hwdb-update.service \
    systemd-timesyncd.service

# Not quietly: without this every import is compiled anew, emulated.
python3 -m compileall -q /usr/local/lib/sandboxd-vm
rm -rf /vm /var/cache/apt /var/lib/apt/lists /usr/share/doc /usr/share/man /usr/share/locale
rm -f /etc/apt/apt.conf.d/99mmdebstrap /etc/apt/sources.list /etc/resolv.conf
