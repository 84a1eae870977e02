package ublk

import "slices"

// State is a state in the life of a device; see the package documentation.
type State int

// The states of a device of this process.
const (
	StateStarting State = iota
	StateLive
	StateStopping
	StateDead
	StateRecovering
	StateQuiescing
	StateQuiesced
)

// String returns the name of the state.
func (s State) String() string {
	return [...]string{"starting", "live", "stopping", "dead", "recovering", "quiescing", "quiesced"}[s]
}

// transitions are all the steps in the life of a device. Dead and quiesced are ends.
var transitions = [...][]State{
	StateStarting:   {StateLive, StateStopping, StateDead},                     // stopping: a start that is undone
	StateRecovering: {StateLive, StateQuiesced, StateDead},                     // dead: stopped from outside meanwhile
	StateLive:       {StateStopping, StateQuiescing, StateDead, StateQuiesced}, // the ends: its queues broke
	StateStopping:   {StateLive, StateDead},                                    // live: refused, it is in use
	StateQuiescing:  {StateLive, StateQuiesced, StateDead},                     // live: it could not be in time
	StateDead:       nil,
	StateQuiesced:   nil,
}

// moveLocked moves the device to a state if there is such a transition, and reports whether there is. Nothing else sets
// the state. d.mu is held.
func (d *Device) moveLocked(to State) bool {
	if !slices.Contains(transitions[d.state], to) {
		return false
	}
	d.state = to
	return true
}

// ended reports whether the device's life is over.
func (s State) ended() bool { return s == StateDead || s == StateQuiesced }
