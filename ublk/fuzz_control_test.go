package ublk

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// scriptedDriver answers control commands as a program says: with an errno, or with arbitrary content.
type scriptedDriver struct {
	t        *testing.T
	code     []byte
	commands int    // of the present instruction
	learned  bool   // it has answered GET_FEATURES
	legacy   bool   // ... as a driver that may know the legacy opcodes only
	last     []byte // what it has put into the buffer of the last command that asks
	errno    unix.Errno
}

var scriptedErrnos = []unix.Errno{unix.ENODEV, unix.EOPNOTSUPP, unix.EINVAL, unix.EBUSY, unix.EPERM, unix.EACCES, unix.ENOENT, unix.EINTR, unix.ENOSPC, unix.EEXIST, unix.ENOMEM}

func (d *scriptedDriver) next() byte {
	if len(d.code) == 0 {
		return 0
	}
	b := d.code[0]
	d.code = d.code[1:]
	return b
}

func (d *scriptedDriver) run(ctx context.Context, op uint32, cmd ctrlCmd, buf unsafe.Pointer) (int32, error) {
	if d.commands++; d.commands > 50+len(d.code) { // an instruction may repeat a command while the driver tells it to
		d.t.Fatal("the commands do not end")
	}
	if op == cmdGetFeatures {
		d.learned = true
	} else if !d.learned || op <= opMask && !d.legacy {
		d.t.Fatalf("command %#x is not in the driver's dialect", op)
	}
	d.errno = 0
	if b := d.next(); b >= 128 {
		d.errno = scriptedErrnos[int(b)%len(scriptedErrnos)]
		if op == cmdGetFeatures {
			d.legacy = d.errno == unix.EOPNOTSUPP || d.errno == unix.EINVAL || d.errno == unix.ENODEV
		}
		return -int32(d.errno), ctx.Err()
	}
	if cmd.pathLen > cmd.len || cmd.pathLen > 0 && string(unsafe.Slice((*byte)(buf), cmd.pathLen)) != pathField(int(cmd.devID)) {
		d.t.Fatalf("command %#x has a path of %d bytes in %d", op, cmd.pathLen, cmd.len)
	}
	if op == cmdGetFeatures || op&opMask == cmdAddDev&opMask || op&^opMask == iocRead || op <= opMask && asksOf(op) {
		out := unsafe.Slice((*byte)(buf), cmd.len)[cmd.pathLen:]
		n := copy(out, d.code)
		d.code = d.code[n:]
		clear(out[n:])
		if nr := op & opMask; nr == cmdGetDevInfo&opMask || nr == cmdGetDevInfo2&opMask {
			binary.LittleEndian.PutUint32(out[12:], cmd.devID) // a driver answers for the device that it was asked about
		}
		d.last = append([]byte(nil), out...)
	}
	return 0, ctx.Err()
}

func pathField(id int) string {
	return charPath(id) + strings.Repeat("\x00", charPathSize-len(charPath(id)))
}

// asksOf reports whether a legacy opcode is of a command that asks.
func asksOf(op uint32) bool {
	for _, c := range []uint32{cmdGetQueueAffinity, cmdGetDevInfo, cmdGetParams, cmdGetDevInfo2, cmdGetFeatures} {
		if c&opMask == op {
			return true
		}
	}
	return false
}

// checkError holds an error to name the device, and to say that it is not there if the driver says so.
func (d *scriptedDriver) checkError(id int, err error) {
	if err == nil {
		return
	}
	if d.errno == unix.ENODEV && !errors.Is(err, ErrNotFound) && !strings.Contains(err.Error(), "features") {
		d.t.Errorf("%v, after %v", err, d.errno)
	}
	if !strings.Contains(err.Error(), fmt.Sprintf("device %d", id)) && !strings.Contains(err.Error(), "features") {
		d.t.Errorf("the error does not say which device: %v", err)
	}
}

// FuzzControl runs a program of control commands against a driver that answers anything: errors in any place, and
// arbitrary features, device information and parameters. Each command must end, keep to the driver's dialect, report
// what the driver says at the places that the kernel's header gives, or an error that names the device.
func FuzzControl(f *testing.F) {
	le := binary.LittleEndian
	info := make([]byte, 64)
	le.PutUint16(info, 4)       // queues
	le.PutUint16(info[2:], 128) // depth
	le.PutUint16(info[4:], 2)   // state
	le.PutUint32(info[12:], 7)  // id
	le.PutUint64(info[24:], uint64(FeatureUserRecovery|FeatureUnprivileged))
	for op := range byte(12) {
		f.Add(append(append([]byte{op, 7, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0}, info...), info...))
		f.Add([]byte{op, 7, 129, 128, 129, 129, 130, 0, 0, 1, 135, 135, 131})
		f.Add([]byte{op, 7, 128, 0, op, 8, 0, 130, 131, op, 9, 133})
	}
	f.Add([]byte{3, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0}) // other parameters than were set
	f.Fuzz(func(t *testing.T, code []byte) {
		if len(code) > 1000 {
			return
		}
		d := &scriptedDriver{t: t, code: code}
		c := newControl(d)
		for len(d.code) > 0 {
			d.commands = 0
			d.command(c, d.next(), int(d.next()))
		}
	})
}

// command performs one instruction of the program.
func (d *scriptedDriver) command(c *control, op byte, id int) {
	ctx, cancel := context.WithTimeout(d.t.Context(), 10*time.Second)
	defer cancel()
	to := target{id: id, byPath: op&64 != 0}
	switch op % 12 {
	case 0:
		d.describe(ctx, c, id)
	case 1:
		i, err := c.getInfo(ctx, id)
		if d.checkError(id, err); err == nil {
			d.checkInfo(i)
		}
	case 2:
		p, err := c.getParams(ctx, to)
		if d.checkError(id, err); err == nil {
			d.checkOptions(p)
		}
	case 3:
		p := Options{Size: 1 << 20}.withDefaults().params()
		want := p.basic
		if err := c.setParams(ctx, to, p); err == nil && string(d.last[8:8+unsafe.Sizeof(want)]) != string(bytesOf(&want)) {
			d.t.Errorf("the driver has other parameters, %x", d.last)
		}
	case 4:
		i := &devInfo{devID: uint32(id), queues: 1, depth: 1}
		if err := c.add(ctx, i); err == nil {
			d.checkInfo(i)
		} else if !strings.HasPrefix(err.Error(), "ublk: a") {
			d.t.Error(err)
		}
	case 5:
		feat, err := c.features(ctx)
		if names := (FeatureSet{Bits: feat}).Names(); err == nil && len(names) > 64 {
			d.t.Error(names)
		}
	case 6:
		d.checkError(id, c.start(ctx, to))
	case 7:
		_ = c.del(ctx, to)
	case 8:
		_ = c.resize(ctx, to, uint64(id))
	case 9:
		if set, err := c.affinity(ctx, to, id); err == nil && set.Count() > 1024 {
			d.t.Error(set.Count())
		}
	case 10:
		_ = c.quiesce(ctx, to, time.Duration(id))
	case 11:
		all, err := c.describeAll(ctx, []int{id, id + 1})
		if len(all) < 2 && err == nil && !strings.Contains(fmt.Sprint(d.errno), "no such device") && d.errno != 0 {
			d.t.Errorf("a device is missing from the list without an error, after %v", d.errno)
		}
	}
}

// checkInfo compares device information with the bytes that the driver gave, by the offsets of struct
// ublksrv_ctrl_dev_info.
func (d *scriptedDriver) checkInfo(i *devInfo) {
	le, b := binary.LittleEndian, d.last
	if i.queues != le.Uint16(b) || i.depth != le.Uint16(b[2:]) || i.state != le.Uint16(b[4:]) || i.maxIOBytes != le.Uint32(b[8:]) ||
		i.devID != le.Uint32(b[12:]) || uint32(i.serverPID) != le.Uint32(b[16:]) || i.flags != le.Uint64(b[24:]) ||
		i.serverFlags != le.Uint64(b[32:]) || i.ownerUID != le.Uint32(b[40:]) || i.ownerGID != le.Uint32(b[44:]) {
		d.t.Errorf("%+v, and the driver said %x", i, b)
	}
	if to := i.target(); to.byPath != (le.Uint64(b[24:])>>5&1 != 0) {
		d.t.Errorf("%+v", to)
	}
}

// checkOptions makes options from parameters of the driver, as a recovery does, and compares them with the bytes that the
// driver gave.
func (d *scriptedDriver) checkOptions(p *params) {
	le, b := binary.LittleEndian, d.last
	o := optionsOf(&devInfo{devID: 5, queues: 2, depth: 3}, p)
	attrs := le.Uint32(b[8:])
	if o.ReadOnly != (attrs&1 != 0) || o.VolatileCache != (attrs&4 != 0) || o.FUA != (attrs&8 != 0) || o.Size != int64(le.Uint64(b[24:]))<<9 ||
		o.Discard != (le.Uint32(b[4:])&2 != 0) || o.DiscardGranularity != int(le.Uint32(b[44:])) || *o.ID != 5 || o.Queues != 2 || o.Depth != 3 {
		d.t.Errorf("%+v, and the driver said %x", o, b)
	}
}

func (d *scriptedDriver) describe(ctx context.Context, c *control, id int) {
	i, err := c.describe(ctx, id)
	if d.checkError(id, err); err == nil && (i.ID != id || i.ServerPID < 0 || i.Queues > 1<<16 || i.State.String() == "" || i.Path() != fmt.Sprintf("/dev/ublkb%d", id)) {
		d.t.Errorf("%+v", i)
	}
}

// FuzzMounts reads texts like those in /proc: arbitrary ones must do no harm, and a mount that is added to them must be
// found, with the names that it has, whatever characters they have.
func FuzzMounts(f *testing.F) {
	f.Add("36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n", "/a b", "/dev/ublkb0")
	f.Add("40 35 0:30 / /merged rw - overlay overlay rw,lowerdir=/a:/b,upperdir=/c\n/dev/ublkb0p1 partition 1 2 3\n", "/\t\\x\n", "/dev/x y")
	f.Add("a b c d e - f g\n - \n/dev/ublkb0", "/", "/")
	escape := strings.NewReplacer(" ", `\040`, "\t", `\011`, "\n", `\012`, `\`, `\134`).Replace
	f.Fuzz(func(t *testing.T, text, point, source string) {
		devs := map[string]bool{"259:3": true, "0:30": true}
		for _, m := range mountsOf(devs, text) {
			if m == "" {
				t.Fatal("a mount without a name")
			}
		}
		for line := range strings.Lines(text) {
			if point, _, ok := parseMount(line); ok && point == "" {
				t.Fatalf("%q has a mount point without a name", line)
			}
		}
		_ = swapsOn("ublkb0", text)
		if sourcesOf("/x/y", text); strings.ContainsAny(printable(text), "\n\x1b\x00") {
			t.Fatalf("%q is not printable", printable(text))
		}
		point, source = "/"+strings.TrimPrefix(point, "/"), "/"+source
		if odd(point) || odd(source) || point != filepath.Clean(point) {
			return
		}
		line := fmt.Sprintf("\n36 35 259:3 / %s rw shared:1 - ext4 %s rw\n", escape(point), escape(source))
		if found := mountsOf(devs, text+line); len(found) == 0 || found[len(found)-1] != point {
			t.Fatalf("%q is not found in %q", point, found)
		}
		if got := sourcesOf(point, text+line); len(got) != 1 || got[0] != source {
			t.Fatalf("%q is from %q, not %q", point, got, source)
		}
	})
}

// odd reports whether a name has white space that the kernel does not escape.
func odd(name string) bool {
	return strings.ContainsFunc(name, func(r rune) bool { return strings.ContainsRune("\r\v\f\u0085\u00a0", r) || r > 127 })
}

// FuzzDeviceName holds the names of devices to be those that the driver gives them, and no other spelling of a number.
func FuzzDeviceName(f *testing.F) {
	for _, s := range []string{"ublkc0", "ublkc17", "ublkc+1", "ublkc-1", "ublkc01", "ublkc", "ublkb0", "ublkc4294967296", "ublkc99999999999999999999"} {
		f.Add(s)
	}
	number := regexp.MustCompile(`\Aublkc(0|[1-9][0-9]*)\z`)
	f.Fuzz(func(t *testing.T, name string) {
		id, ok := idOf(name, "ublkc")
		if ok && (filepath.Base(charPath(id)) != name || id < 0 || id >= maxDeviceID) {
			t.Fatal(name, id)
		}
		if ok != (number.MatchString(name) && len(name) < 15 && atoi(name[5:]) < maxDeviceID) {
			t.Fatal(name, ok)
		}
	})
}

func atoi(s string) (n int) {
	_, _ = fmt.Sscan(s, &n)
	return n
}
