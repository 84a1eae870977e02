package ublk

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Feature is a set of bits for what the driver can do (UBLK_F_*).
type Feature uint64

// The features of the driver up to Linux 7.3.
const (
	FeatureZeroCopy          Feature = 1 << 0
	FeatureCompInTask        Feature = 1 << 1
	FeatureNeedGetData       Feature = 1 << 2
	FeatureUserRecovery      Feature = 1 << 3
	FeatureRecoveryReissue   Feature = 1 << 4
	FeatureUnprivileged      Feature = 1 << 5
	FeatureIoctlEncode       Feature = 1 << 6
	FeatureUserCopy          Feature = 1 << 7
	FeatureZoned             Feature = 1 << 8
	FeatureRecoveryFailIO    Feature = 1 << 9
	FeatureUpdateSize        Feature = 1 << 10
	FeatureAutoBufReg        Feature = 1 << 11
	FeatureQuiesce           Feature = 1 << 12
	FeaturePerIODaemon       Feature = 1 << 13
	FeatureBufRegOffDaemon   Feature = 1 << 14
	FeatureBatchIO           Feature = 1 << 15
	FeatureIntegrity         Feature = 1 << 16
	FeatureSafeStop          Feature = 1 << 17
	FeatureNoAutoPartScan    Feature = 1 << 18
	FeatureSharedMemZeroCopy Feature = 1 << 19
	FeatureDescSize          Feature = 1 << 20
)

// unspoken are the features with which the driver expects something of a server, or does something for it, that this
// package does not implement. If a disk with such a feature were served without regard to it, its users would read
// arbitrary memory.
const unspoken = FeatureZeroCopy | FeatureNeedGetData | FeatureZoned | FeatureAutoBufReg | FeatureIntegrity |
	FeatureSharedMemZeroCopy | FeatureDescSize

// FeatureInfo is a feature, its name, and the kernel that brought it.
type FeatureInfo struct {
	Feature Feature
	Name    string // the header's name without UBLK_F_
	Since   string // the first Linux release that has it
}

// KnownFeatures returns every feature that this package has a name for, in the order of their bits.
func KnownFeatures() []FeatureInfo { return slices.Clone(knownFeatures) }

var knownFeatures = []FeatureInfo{
	{FeatureZeroCopy, "SUPPORT_ZERO_COPY", "6.15"},
	{FeatureCompInTask, "URING_CMD_COMP_IN_TASK", "6.0"},
	{FeatureNeedGetData, "NEED_GET_DATA", "6.0"},
	{FeatureUserRecovery, "USER_RECOVERY", "6.1"},
	{FeatureRecoveryReissue, "USER_RECOVERY_REISSUE", "6.1"},
	{FeatureUnprivileged, "UNPRIVILEGED_DEV", "6.3"},
	{FeatureIoctlEncode, "CMD_IOCTL_ENCODE", "6.4"},
	{FeatureUserCopy, "USER_COPY", "6.5"},
	{FeatureZoned, "ZONED", "6.6"},
	{FeatureRecoveryFailIO, "USER_RECOVERY_FAIL_IO", "6.13"},
	{FeatureUpdateSize, "UPDATE_SIZE", "6.16"},
	{FeatureAutoBufReg, "AUTO_BUF_REG", "6.16"},
	{FeatureQuiesce, "QUIESCE", "6.16"},
	{FeaturePerIODaemon, "PER_IO_DAEMON", "6.16"},
	{FeatureBufRegOffDaemon, "BUF_REG_OFF_DAEMON", "6.17"},
	{FeatureBatchIO, "BATCH_IO", "7.0"},
	{FeatureIntegrity, "INTEGRITY", "7.0"},
	{FeatureSafeStop, "SAFE_STOP_DEV", "7.0"},
	{FeatureNoAutoPartScan, "NO_AUTO_PART_SCAN", "7.0"},
	{FeatureSharedMemZeroCopy, "SHMEM_ZC", "7.1"},
	{FeatureDescSize, "IO_DESC_SIZE", "7.3"},
}

// FeatureError reports that the kernel lacks features that were asked for. It matches ErrKernelTooOld.
type FeatureError struct {
	Missing Feature
	Kernel  string // release of the running kernel
}

// Error names the missing features, and the kernels that brought them.
func (e *FeatureError) Error() string {
	var texts []string
	for _, name := range (FeatureSet{Bits: e.Missing}).Names() {
		since := "a later Linux"
		for _, k := range knownFeatures {
			if k.Name == name {
				since = "Linux " + k.Since
			}
		}
		texts = append(texts, name+" (since "+since+")")
	}
	return fmt.Sprintf("ublk: the kernel, %s, does not offer %s", e.Kernel, strings.Join(texts, ", "))
}

// Is makes errors.Is(err, ErrKernelTooOld) true.
func (e *FeatureError) Is(target error) bool { return target == ErrKernelTooOld }

// FeatureSet is what the running kernel offers.
type FeatureSet struct {
	Bits   Feature
	Kernel string // release of the running kernel, as from uname(2)
}

// Has reports whether all of f is offered.
func (s FeatureSet) Has(f Feature) bool { return s.Bits&f == f }

// Names returns the names of the offered features. A bit without a name is "bit N".
func (s FeatureSet) Names() []string {
	var names []string
	for bit := range 64 {
		if f := Feature(1) << bit; s.Has(f) {
			names = append(names, f.String())
		}
	}
	return names
}

// String returns the name of a single feature bit.
func (f Feature) String() string {
	for _, k := range knownFeatures {
		if k.Feature == f {
			return k.Name
		}
	}
	for bit := range 64 {
		if f == 1<<bit {
			return fmt.Sprintf("bit %d", bit)
		}
	}
	return fmt.Sprintf("%#x", uint64(f))
}

// Features asks the driver what it can do. It returns after at most 20 seconds, with the answer or without. A driver
// before Linux 6.5 cannot be asked, so Features adds a device and looks at what was granted. The kernel's release is
// set even if there is no answer; the error is then ErrNoDriver, ErrPermission or ErrKernelTooOld.
func Features() (FeatureSet, error) {
	s := FeatureSet{Kernel: kernelRelease()}
	c, err := openControl()
	if err == nil {
		s.Bits, err = c.features(context.Background())
	}
	return s, err
}

// features is offered, but on kernels that show their features only in the answer to ADD it makes a device.
func (c *control) features(ctx context.Context) (Feature, error) {
	f, err := c.offered(ctx)
	if err != nil || f != ^Feature(0) {
		return f, err
	}
	// All features that Linux 6.4 may have, except UNPRIVILEGED_DEV, which a process with CAP_SYS_ADMIN is not granted.
	ask := FeatureCompInTask | FeatureNeedGetData | FeatureUserRecovery | FeatureRecoveryReissue | FeatureIoctlEncode
	info := &devInfo{devID: kernelPicks, queues: 1, depth: 1, maxIOBytes: uint32(os.Getpagesize()), flags: uint64(ask)}
	if err := c.add(ctx, info); err != nil {
		return 0, err
	}
	if err := c.del(ctx, info.target()); err != nil {
		return 0, deviceError("delete", int(info.devID), err)
	}
	return Feature(info.flags), nil
}

func kernelRelease() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}
