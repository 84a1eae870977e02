package ublk

import (
	"context"
	"errors"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// fakeDriver answers control commands as the driver of one kernel does (drivers/block/ublk_drv.c), without any queues.
type fakeDriver struct {
	since         Feature // all that the driver knows
	features      bool    // GET_FEATURES (6.5)
	info2         bool    // GET_DEV_INFO2 (6.3)
	encoded       bool    // ioctl-encoded commands (6.4)
	legacyOpcodes bool    // opcodes of one byte; a build option since 6.4
	admin         bool    // the caller has CAP_SYS_ADMIN

	devices map[uint32]*devInfo
	params  map[uint32]params
	log     []uint32
}

// always are features that the driver grants even if they are not asked for.
const always = FeatureCompInTask

func (f *fakeDriver) run(ctx context.Context, op uint32, cmd ctrlCmd, buf unsafe.Pointer) (int32, error) {
	f.log = append(f.log, op)
	return -int32(f.answer(op, cmd, buf)), ctx.Err()
}

func (f *fakeDriver) answer(op uint32, cmd ctrlCmd, buf unsafe.Pointer) unix.Errno {
	full := op > 0xff
	if full && f.encoded && op == cmdGetFeatures && f.features {
		*(*uint64)(buf) = uint64(f.since)
		return 0
	}
	if !full && !f.legacyOpcodes {
		return unix.EOPNOTSUPP // the first thing that a driver without them checks
	}
	if nr := op & opMask; nr == cmdAddDev&opMask && full == f.isFull(op) {
		return f.add(cmd, (*devInfo)(buf))
	}
	d := f.devices[cmd.devID]
	if d == nil {
		return unix.ENODEV
	}
	if full && !f.encoded {
		return unix.EOPNOTSUPP
	}
	if Feature(d.flags)&FeatureUnprivileged != 0 || op&opMask == cmdGetDevInfo2&opMask && f.info2 {
		if cmd.pathLen == 0 || cmd.len < cmd.pathLen ||
			!strings.HasPrefix(string(unsafe.Slice((*byte)(buf), cmd.pathLen)), charPath(int(cmd.devID))+"\x00") {
			return unix.EINVAL
		}
		if cmd.len > cmd.pathLen { // else nothing follows, and the end of the path is the end of the memory
			buf = unsafe.Add(buf, cmd.pathLen)
		}
	}
	switch op & opMask {
	case cmdGetDevInfo2 & opMask:
		if !f.info2 {
			return unix.EOPNOTSUPP
		}
		*(*devInfo)(buf) = *d
	case cmdGetDevInfo & opMask:
		*(*devInfo)(buf) = *d
	case cmdSetParams & opMask:
		f.params[cmd.devID] = *(*params)(buf)
	case cmdGetParams & opMask:
		*(*params)(buf) = f.params[cmd.devID]
	case cmdDelDev & opMask:
		delete(f.devices, cmd.devID)
	default:
		return unix.EOPNOTSUPP
	}
	return 0
}

// isFull reports whether ADD is known in op's form.
func (f *fakeDriver) isFull(op uint32) bool { return op > 0xff && f.encoded }

func (f *fakeDriver) add(cmd ctrlCmd, info *devInfo) unix.Errno {
	if cmd.devID != info.devID || cmd.queueID != noQueue || cmd.pathLen != 0 {
		return unix.EINVAL
	}
	flags := Feature(info.flags) & f.since
	if f.admin {
		flags &^= FeatureUnprivileged
	} else if flags&FeatureUnprivileged == 0 {
		return unix.EPERM
	}
	if flags&FeatureQuiesce != 0 && flags&FeatureUserRecovery == 0 {
		return unix.EINVAL
	}
	if f.encoded {
		flags |= FeatureIoctlEncode
	}
	info.devID, info.flags = 3, uint64(flags|always)
	copied := *info
	f.devices[info.devID] = &copied
	return 0
}

// upTo returns the features of all kernels up to one.
func upTo(names ...string) Feature {
	var f Feature
	for _, k := range knownFeatures {
		for _, n := range names {
			if k.Since == n {
				f |= k.Feature
			}
		}
	}
	return f
}

func driverOf(kernel string) *fakeDriver {
	f := &fakeDriver{legacyOpcodes: true, admin: true, devices: make(map[uint32]*devInfo), params: make(map[uint32]params)}
	releases := []string{"6.0", "6.1", "6.3", "6.4", "6.5", "6.6", "6.13", "6.15", "6.16", "6.17", "7.0", "7.1", "7.3"}
	number := map[string]int{"6.1": 2, "6.3": 3, "6.4": 4, "6.4 without legacy opcodes": 4, "6.5": 5, "6.12": 6, "7.0": 11, "7.3": 13}[kernel]
	f.since = upTo(releases[:number]...)
	f.info2, f.encoded, f.features = number >= 3, number >= 4, number >= 5
	f.legacyOpcodes = kernel != "6.4 without legacy opcodes" && number < 11
	return f
}

// TestNegotiation makes a device with the drivers of old and new kernels, and checks the commands that each got.
func TestNegotiation(t *testing.T) {
	ctx := context.Background()
	for _, k := range []struct {
		kernel string
		form   string // of the commands
	}{
		{"6.1", "legacy"},
		{"6.3", "legacy"},
		{"6.4", "legacy"},
		{"6.4 without legacy opcodes", "encoded"},
		{"6.5", "encoded"},
		{"6.12", "encoded"},
		{"7.0", "encoded"},
		{"7.3", "encoded"},
	} {
		t.Run(k.kernel, func(t *testing.T) {
			f := driverOf(k.kernel)
			c := newControl(f)
			offered, err := c.offered(ctx)
			if err != nil {
				t.Fatal(err)
			}
			o := Options{Size: 1 << 20, Recovery: RecoverReissue, NoPartitionScan: true, Cookie: 7}.withDefaults()
			info, err := o.info(offered)
			if err != nil {
				t.Fatal(err)
			}
			if err := c.add(ctx, info); err != nil {
				t.Fatal(err)
			}
			want := FeatureUserRecovery | FeatureRecoveryReissue | (FeatureQuiesce|FeatureUpdateSize|FeatureNoAutoPartScan)&f.since
			if got := Feature(info.flags) &^ always &^ FeatureIoctlEncode; got != want {
				t.Errorf("granted %v, want %v", FeatureSet{Bits: got}.Names(), FeatureSet{Bits: want}.Names())
			}
			if err := c.setParams(ctx, info.target(), o.params()); err != nil {
				t.Error(err)
			}
			for range 2 { // the second time it knows
				got, err := c.getInfo(ctx, 3)
				if err != nil || got.serverFlags != 7 || got.flags != info.flags {
					t.Errorf("info %+v, %v", got, err)
				}
			}
			last := f.log[len(f.log)-1]
			if form := map[bool]string{true: "legacy", false: "encoded"}[last <= 0xff]; form != k.form {
				t.Errorf("spoken to with %s opcodes (%#x), want %s", form, last, k.form)
			}
			if wantInfo := map[bool]uint32{true: cmdGetDevInfo2, false: cmdGetDevInfo}[f.info2] & opMask; last&opMask != wantInfo {
				t.Errorf("asked for the device with %#x", last)
			}
			if _, err := c.getInfo(ctx, 4); !errors.Is(err, ErrNotFound) {
				t.Errorf("a device that is not there: %v", err)
			}
			if err := c.del(ctx, info.target()); err != nil {
				t.Error(err)
			}
			bits, err := c.features(ctx)
			if err != nil || bits&FeatureUserRecovery == 0 || f.features && bits != f.since || len(f.devices) != 0 {
				t.Errorf("features %v, %v, %d devices left", FeatureSet{Bits: bits}.Names(), err, len(f.devices))
			}
		})
	}
}

// TestMissingFeatures: features that a kernel does not have are refused by name, even if the kernel cannot be asked and
// only grants less. No device stays.
func TestMissingFeatures(t *testing.T) {
	ctx := context.Background()
	for _, k := range []struct {
		kernel string
		o      Options
		want   string
	}{
		{"6.1", Options{Copy: CopyUser}, "USER_COPY (since Linux 6.5)"},
		{"6.4", Options{Recovery: RecoverFailIO}, "USER_RECOVERY_FAIL_IO (since Linux 6.13)"},
		{"6.12", Options{Recovery: RecoverFailIO}, "USER_RECOVERY_FAIL_IO (since Linux 6.13)"},
		{"6.12", Options{Copy: CopyBatch}, "BATCH_IO (since Linux 7.0)"},
		{"6.12", Options{Require: FeatureQuiesce | FeatureUpdateSize}, "UPDATE_SIZE (since Linux 6.16), QUIESCE (since Linux 6.16)"},
		{"7.3", Options{Require: 1 << 50}, "bit 50 (since a later Linux)"},
	} {
		f := driverOf(k.kernel)
		k.o.Size = 1 << 20
		_, err := create(ctx, newControl(f), k.o.withDefaults(), nil)
		var missing *FeatureError
		if !errors.As(err, &missing) || !errors.Is(err, ErrKernelTooOld) || !strings.Contains(err.Error(), k.want) {
			t.Errorf("%s: want %q, got %v", k.kernel, k.want, err)
		}
		if len(f.devices) != 0 {
			t.Errorf("%s: a device is left", k.kernel)
		}
	}
}

// TestUnprivilegedCommands: every command to an unprivileged device carries the char device's path, to others none.
func TestUnprivilegedCommands(t *testing.T) {
	ctx := context.Background()
	f := driverOf("6.12")
	f.admin = false
	c := newControl(f)
	o := Options{Size: 1 << 20}.withDefaults()
	info, _ := o.info(f.since)
	if err := c.add(ctx, info); !errors.Is(err, ErrPermission) {
		t.Errorf("a privileged device by a user: %v", err)
	}
	o.Unprivileged = true
	info, _ = o.info(f.since)
	if err := c.add(ctx, info); err != nil {
		t.Fatal(err)
	}
	if !info.target().byPath {
		t.Errorf("flags %#x", info.flags)
	}
	if err := c.setParams(ctx, info.target(), o.params()); err != nil {
		t.Error(err)
	}
	if got, err := c.describe(ctx, 3); err != nil || got.Size != 1<<20 {
		t.Errorf("%+v, %v", got, err)
	}
	if err := c.del(ctx, info.target()); err != nil || len(f.devices) != 0 {
		t.Errorf("delete: %v", err)
	}
}

// TestRecoverOfAnotherKind: a device with features that this package does not implement, such as zero copy, is left to
// the program that made it.
func TestRecoverOfAnotherKind(t *testing.T) {
	f := driverOf("7.3")
	for _, k := range knownFeatures {
		f.devices[3] = &devInfo{devID: 3, state: uint16(KernelQuiesced), serverPID: -1, flags: uint64(FeatureUserRecovery | k.Feature)}
		_, err := newControl(f).waitOrphan(t.Context(), 3, 0)
		spoken := unspoken&k.Feature == 0
		if spoken != (err == nil) || !spoken && (!errors.Is(err, ErrNotRecoverable) || !strings.Contains(err.Error(), k.Name)) {
			t.Errorf("%s: %v", k.Name, err)
		}
	}
}
