package nbd

import "errors"

// failure is why a request failed, as the client learns it. The zero value is success.
type failure struct {
	errno   uint32
	text    string // for people; may be empty
	at      uint64 // where it failed
	located bool   // at is known
}

// maxErrorText bounds the text of a failure, so that there is room for it in a batch.
const maxErrorText = 512

// locatedError is an error of a device with the offset that it concerns.
type locatedError struct {
	at  int64
	err error
}

func (e *locatedError) Error() string { return e.err.Error() }
func (e *locatedError) Unwrap() error { return e.err }

// failed returns the failure for the device's answer to req, and logs it, since most clients show only the number.
func (c *conn) failed(req request, err error) failure {
	if err == nil {
		return failure{}
	}
	if err != errGivenUp {
		c.srv.logFailed(c.name, req, err)
	}
	f := failure{errno: wireErrno(err), text: clip(err.Error(), maxErrorText)}
	if p := new(PanicError); errors.As(err, &p) {
		f.text = "the server has failed, and its log says how"
	}
	if l := new(locatedError); errors.As(err, &l) {
		f.at, f.located = uint64(l.at), true
	}
	return f
}

// replyRoom is the room in a batch for a reply without content, or for the header of one with content. The longest is
// ERROR_OFFSET.
const replyRoom = extChunkLen + 4 + 2 + maxErrorText + 8

// replyBatched adds a reply without content to the batch.
func (c *conn) replyBatched(req request, f failure) {
	c.room(replyRoom)
	c.batch.b = c.appendResult(c.batch.b, req, f)
	c.addedReply()
}

// appendResult appends the reply to a request that has no content to return, or that failed.
func (c *conn) appendResult(b []byte, req request, f failure) []byte {
	if f.errno != 0 {
		return c.appendError(b, req, f)
	}
	if c.structured && req.typ == cmdRead { // of nothing
		return c.appendChunk(b, chunkFlagDone, chunkNone, req, 0)
	}
	return c.appendSimple(b, req, 0)
}

// appendError appends an error reply, structured where the specification wants it so.
func (c *conn) appendError(b []byte, req request, f failure) []byte {
	c.counters.errors.Add(1)
	if c.extended || c.structured && (req.typ == cmdRead || req.typ == cmdBlockStatus) {
		return c.appendErrorChunk(b, req, f)
	}
	return c.appendSimple(b, req, f.errno)
}
