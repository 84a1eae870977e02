package powercut

import (
	"context"
	"fmt"
	"path/filepath"
	"sync"
)

// fio is a writer that lets fio(1) write one of two files in random order, several requests at once, and then sync it.
// The files take turns, so the one of the last round is left alone until the next round has ended.
type fio struct {
	mu           sync.Mutex // guards what follows
	sent, synced int        // rounds
	file         int        // that of the round synced
	syncs        int        // since the last cut
}

// args are the arguments of a round. Each block has the number of its round and its offset in each 19 bytes or so, thus
// a block of another round or place is found.
func (f *fio) args(file, round int) []string {
	return []string{
		"--name=v", "--filename=" + filepath.Join(upper, fmt.Sprintf("fio%d", file)), "--size=2M", "--rw=randwrite", "--bsrange=4k-64k",
		"--ioengine=libaio", "--direct=1", "--iodepth=8", "--end_fsync=1", "--verify_fatal=1", "--verify=pattern",
		fmt.Sprintf("--verify_pattern=%%o\"round %04d\"", round), fmt.Sprintf("--randseed=%d", round),
	}
}

// load writes round after round until the file system fails or the context ends.
func (f *fio) load(ctx context.Context) error {
	for {
		f.mu.Lock()
		f.sent++
		file, round := 1-f.file, f.sent
		f.mu.Unlock()
		if out, err := try(ctx, nil, "fio", append(f.args(file, round), "--do_verify=0")...); err != nil {
			return fmt.Errorf("fio: %w: %s", err, out)
		}
		f.mu.Lock()
		f.file, f.synced = file, round
		f.syncs++
		f.mu.Unlock()
	}
}

func (f *fio) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.syncs
}

// written is the file that a round has written and synced. Round 0 has written nothing.
type written struct{ file, round int }

func (f *fio) promise() written {
	f.mu.Lock()
	defer f.mu.Unlock()
	return written{f.file, f.synced}
}

// check reads the file of the promised round. The next round writes the other one.
func (f *fio) check(ctx context.Context, p written) error {
	f.file, f.synced = p.file, p.round
	if p.round == 0 {
		return nil
	}
	if out, err := try(ctx, nil, "fio", append(f.args(p.file, p.round), "--verify_only")...); err != nil {
		return fmt.Errorf("what fio wrote in round %d: %w: %s", p.round, err, out)
	}
	return nil
}
