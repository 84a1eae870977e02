package owner

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/vdisk/vdisk/ublk"
)

// devicesName is the file in a store that lists the ids of its block devices while there are any. A process that is
// killed leaves its devices' ids taken in the kernel, where there are 64 by default; the file lets the next owner give
// them back. Losing it costs no more than that.
const devicesName = "devices"

// deviceList is the content of the file.
type deviceList struct {
	Boot string `json:"boot"` // the kernel's boot id: ids mean nothing after another boot
	IDs  []int  `json:"ublk_ids"`
}

// bootID changes with every boot (random(4)).
func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return string(b[:min(36, len(b))])
}

// recordDevices writes down the ids of the devices there are. Attach and watch call it when that has changed.
func (o *Owner) recordDevices() error {
	o.recording.Lock()
	defer o.recording.Unlock()
	list := deviceList{Boot: bootID(), IDs: slices.Clone(o.leftovers)}
	o.mu.Lock()
	for _, d := range o.devices {
		list.IDs = append(list.IDs, d.block.ID())
	}
	o.mu.Unlock()
	path := filepath.Join(o.dir, devicesName)
	if len(list.IDs) == 0 {
		if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	b, err := json.Marshal(list)
	if err != nil {
		return err
	}
	if err := os.WriteFile(path+".tmp", append(b, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(path+".tmp", path)
}

// sweep deletes what an earlier owner left in the kernel. It is done before the first device is attached.
func (o *Owner) sweep(ctx context.Context) error {
	o.recording.Lock()
	defer o.recording.Unlock()
	if o.swept {
		return nil
	}
	o.swept = true
	b, err := os.ReadFile(filepath.Join(o.dir, devicesName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var list deviceList
	if err == nil {
		err = json.Unmarshal(b, &list)
	}
	if err != nil {
		return fmt.Errorf("reading which devices an earlier owner left: %w", err)
	}
	if list.Boot != bootID() {
		return nil
	}
	devices, err := ublk.Devices(ctx)
	for _, d := range devices {
		// The id may be another server's by now: only what is dead, and cannot be recovered, is nobody's.
		if !slices.Contains(list.IDs, d.ID) || d.State != ublk.KernelDead || d.Features&ublk.FeatureUserRecovery != 0 {
			continue
		}
		if derr := ublk.Delete(ctx, d.ID, false); derr != nil && !errors.Is(derr, ublk.ErrNotFound) {
			o.leftovers = append(o.leftovers, d.ID)
			err = errors.Join(err, derr)
			continue
		}
		o.opts.Logger.Info("deleted what an earlier owner left", "device", d.Path())
	}
	return err
}
