package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

// run soaks for one piece, and returns the sums of all pieces.
func run(ctx context.Context, c config) (*state, error) {
	dir, err := filepath.Abs(c.dir)
	if err != nil {
		return nil, err
	}
	c.dir = dir
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	w := &world{config: c, images: map[string]*image{}, taken: map[string]bool{}, failure: make(chan error, 1)}
	w.brake.cores = c.cores
	w.server = &server{}
	if err := w.load(); err != nil {
		return nil, err
	}
	c.log("seed %d, %v", c.seed, &w.state)
	for r := rand.New(rand.NewPCG(c.seed, 3)); len(w.images) == 0 && len(w.failure) == 0; {
		w.create(r) // the first one creates the store
	}
	err = w.piece(ctx)
	if err != nil {
		w.state.Failed = err.Error()
		return nil, errors.Join(err, w.save())
	}
	return &w.state, nil
}

// piece lets servers live and die until the time is over, and then compares everything.
func (w *world) piece(ctx context.Context) error {
	r := rand.New(rand.NewPCG(w.seed, 0))
	since := time.Now()
	for end := since.Add(w.duration); time.Now().Before(end) && ctx.Err() == nil; {
		if err := w.begin(r); err != nil {
			return err
		}
		if err := w.passed(time.Since(since)); err != nil { // all of it has just been compared
			return err
		}
		since = time.Now()
		life := min(time.Duration(float64(w.life)*(0.3+1.4*r.Float64())), time.Until(end))
		if err := w.live(ctx, r, life); err != nil {
			return err
		}
		w.log("life %d: the files take %d %% of the limit, live data %d %%; %v", w.state.Lives, w.taking.Load(), w.used.Load(), &w.state)
	}
	if err := w.last(r); err != nil {
		return err
	}
	if err := w.passed(time.Since(since)); err != nil {
		return err
	}
	if err := flat(w.samples, w.log); err != nil {
		return err
	}
	w.log("%v, nothing lost", &w.state)
	return w.rest()
}

// begin brings up the next server, and compares the store with its shadow. Sometimes a server is killed before, while it
// opens the store, or a command checks the store first.
func (w *world) begin(r *rand.Rand) error {
	w.state.Lives++
	for r.IntN(5) == 0 {
		s, err := w.start()
		if err != nil {
			return err
		}
		time.Sleep(time.Duration(r.Int64N(int64(300 * time.Millisecond))))
		if err := s.end(syscall.SIGKILL); err != nil {
			return err
		}
		w.ended(syscall.SIGKILL)
	}
	w.server = &server{}
	if r.IntN(5) == 0 && w.state.Lives > 1 {
		if o := w.do([]string{"check"}); o.code != exitOK {
			return errors.New(o.String())
		}
	}
	s, err := w.start()
	if err != nil {
		return err
	}
	w.server = s
	w.brake.serves(s.cmd.Process.Pid)
	if err := s.ready(); err != nil {
		return err
	}
	if err := w.settle(); err != nil {
		return err
	}
	return w.compareAll(r, w.state.Lives%8 == 0)
}

// live does everything at once for a while, and then ends the server.
func (w *world) live(ctx context.Context, r *rand.Rand, life time.Duration) error {
	busy, cancel := context.WithCancel(context.Background())
	defer cancel()
	var wg sync.WaitGroup
	for range w.config.clients {
		r := rand.New(rand.NewPCG(r.Uint64(), 1))
		wg.Go(func() { w.clients(busy, r) })
	}
	for range w.config.commands {
		r := rand.New(rand.NewPCG(r.Uint64(), 2))
		wg.Go(func() { w.orders(busy, r) })
	}
	wg.Go(func() { w.sampler(busy, min(10*time.Second, life/5+time.Millisecond)) })
	var failed error
	select {
	case <-ctx.Done():
	case <-time.After(life):
		w.await(r)
	case <-w.server.gone:
		failed = fmt.Errorf("vdisk serve ended by itself: %w", w.server.err)
	case failed = <-w.failure:
	}
	sig := howToEnd(r)
	if w.atWork.Load() > 0 {
		w.state.count("ends beside a command that changes names")
	}
	err := w.server.end(sig) // in the middle of everything
	cancel()
	wg.Wait()
	w.brake.serves(0)
	w.ended(sig)
	select {
	case f := <-w.failure:
		failed = errors.Join(failed, f)
	default:
	}
	return errors.Join(failed, err)
}

// await waits, three times out of four, for a moment at which a kill cuts off a command that changes names.
func (w *world) await(r *rand.Rand) {
	if r.IntN(4) == 0 {
		return
	}
	for i := 0; i < 5000 && w.atWork.Load() == 0; i++ {
		time.Sleep(time.Millisecond)
	}
	time.Sleep(time.Duration(r.Int64N(int64(60 * time.Millisecond))))
}

// howToEnd chooses how a server ends: mostly by SIGKILL. Sometimes it prints all its stacks while it dies, and sometimes
// it ends in order.
func howToEnd(r *rand.Rand) syscall.Signal {
	switch r.IntN(20) {
	case 0, 1:
		return syscall.SIGTERM
	case 2, 3, 4:
		return syscall.SIGQUIT
	}
	return syscall.SIGKILL
}

// ended counts an end.
func (w *world) ended(sig syscall.Signal) {
	switch sig {
	case syscall.SIGTERM:
		w.state.Ends++
	case syscall.SIGQUIT:
		w.state.Quits++
		w.countGoroutines()
	default:
		w.state.Kills++
	}
}

// last compares everything, and checks the store.
func (w *world) last(r *rand.Rand) error {
	if err := w.begin(r); err != nil {
		return err
	}
	if err := w.compareAll(r, true); err != nil {
		return err
	}
	if err := w.server.end(syscall.SIGTERM); err != nil {
		return err
	}
	w.brake.serves(0)
	w.server = &server{}
	if o := w.do([]string{"check", "--read-data"}); o.code != exitOK {
		return errors.New(o.String())
	}
	return nil
}
