package nbd

import (
	"encoding/binary"
	"time"
)

var be = binary.BigEndian

// Magic numbers of the specification, in the order in which a connection meets them.
const (
	magicInit     = 0x4e42444d41474943 // "NBDMAGIC", starts the greeting
	magicOption   = 0x49484156454f5054 // "IHAVEOPT", in the greeting and before each option
	magicOptReply = 0x0003e889045565a9
	magicRequest  = 0x25609513
	magicSimple   = 0x67446698
	magicChunk    = 0x668e33ef // a structured reply has one or more such chunks

	magicExtRequest = 0x21e41c71 // with extended headers
	magicExtReply   = 0x6e8a278c
)

// Handshake flags. The client's have the same bits as the server's.
const (
	flagFixedNewstyle = 1 << 0
	flagNoZeroes      = 1 << 1
)

// Options.
const (
	optExportName      = 1
	optAbort           = 2
	optList            = 3
	optStartTLS        = 5
	optInfo            = 6
	optGo              = 7
	optStructuredReply = 8
	optListMeta        = 9
	optSetMeta         = 10
	optExtendedHeaders = 11
)

// Option replies. Errors have the top bit set.
const (
	repAck         = 1
	repServer      = 2
	repInfo        = 3
	repMetaContext = 4

	repErrUnsup       = 1<<31 | 1
	repErrPolicy      = 1<<31 | 2
	repErrInvalid     = 1<<31 | 3
	repErrPlatform    = 1<<31 | 4
	repErrTLSRequired = 1<<31 | 5
	repErrUnknown     = 1<<31 | 6
	repErrShutdown    = 1<<31 | 7
	repErrTooBig      = 1<<31 | 9
	repErrExtended    = 1<<31 | 10 // EXT_HEADER_REQD
)

// Kinds of information in a repInfo reply.
const (
	infoExport      = 0
	infoName        = 1
	infoDescription = 2
	infoBlockSize   = 3
)

// Transmission flags.
const (
	flagHasFlags        = 1 << 0
	flagReadOnly        = 1 << 1
	flagSendFlush       = 1 << 2
	flagSendFUA         = 1 << 3
	flagSendTrim        = 1 << 5
	flagSendWriteZeroes = 1 << 6
	flagSendDF          = 1 << 7
	flagMultiConn       = 1 << 8
	flagSendCache       = 1 << 10
	flagSendFastZero    = 1 << 11
)

// Requests.
const (
	cmdRead        = 0
	cmdWrite       = 1
	cmdDisc        = 2
	cmdFlush       = 3
	cmdTrim        = 4
	cmdCache       = 5
	cmdWriteZeroes = 6
	cmdBlockStatus = 7
)

// Request flags.
const (
	cmdFlagFUA      = 1 << 0
	cmdFlagNoHole   = 1 << 1
	cmdFlagDF       = 1 << 2
	cmdFlagReqOne   = 1 << 3
	cmdFlagFastZero = 1 << 4
	cmdFlagPayload  = 1 << 5 // PAYLOAD_LEN, with extended headers
)

// Structured reply chunks.
const (
	chunkFlagDone = 1 << 0

	chunkNone        = 0
	chunkOffsetData  = 1
	chunkOffsetHole  = 2
	chunkBlockStatus = 5
	chunkStatusExt   = 6 // BLOCK_STATUS_EXT
	chunkError       = 1<<15 | 1
	chunkErrorOffset = 1<<15 | 2
)

// base:allocation.
const (
	contextAllocation = "base:allocation"
	stateHole         = 1 << 0
	stateZero         = 1 << 1
)

// Error numbers on the wire. The specification gives them Linux's values.
const (
	errnoPerm     = 1
	errnoIO       = 5
	errnoNoMem    = 12
	errnoInval    = 22
	errnoNoSpace  = 28
	errnoOverflow = 75
	errnoNotSup   = 95
	errnoShutdown = 108
)

const (
	// MaxPayload is the largest payload of one WRITE, or of a READ that is answered in one piece, 32 MiB. The
	// specification asks clients not to exceed it unless something else is negotiated, and the server announces it.
	MaxPayload = 32 << 20

	maxRead      = 1<<32 - 1 // bytes of one READ with extended headers, as without them
	maxOptionLen = 64 << 10  // bytes in the data of one option
	maxNameLen   = 4096      // bytes in any string, by the specification

	requestLen     = 28
	extRequestLen  = 32
	simpleLen      = 16
	chunkLen       = 20
	extChunkLen    = 32
	offsetDataLen  = extChunkLen + 8 // at most
	offsetHoleLen  = extChunkLen + 12
	optionLen      = 16
	optReplyLen    = 20
	exportZeroes   = 124 // zero bytes after an EXPORT_NAME reply, without NO_ZEROES
	maxDescriptors = 4096
)

// request is a request header, without the payload that may follow it.
type request struct {
	flags, typ uint16
	cookie     uint64
	off        uint64
	length     uint64
	asked      uint64    // off as the client gave it, which an extended reply repeats
	arrived    time.Time // of a request that is handed over
}

// parseRequest decodes requestLen bytes, or extRequestLen with extended headers. ok is false if they are not a request.
func parseRequest(b []byte, extended bool) (r request, ok bool) {
	_ = b[requestLen-1]
	r = request{
		flags:  be.Uint16(b[4:]),
		typ:    be.Uint16(b[6:]),
		cookie: be.Uint64(b[8:]),
		off:    be.Uint64(b[16:]),
		asked:  be.Uint64(b[16:]),
	}
	if extended {
		r.length = be.Uint64(b[24:])
		return r, be.Uint32(b) == magicExtRequest
	}
	r.length = uint64(be.Uint32(b[24:]))
	return r, be.Uint32(b) == magicRequest
}

func appendOptReply(b []byte, option, typ uint32, data ...string) []byte {
	n := 0
	for _, d := range data {
		n += len(d)
	}
	b = be.AppendUint64(b, magicOptReply)
	b = be.AppendUint32(b, option)
	b = be.AppendUint32(b, typ)
	b = be.AppendUint32(b, uint32(n))
	for _, d := range data {
		b = append(b, d...)
	}
	return b
}

func u16(v uint16) string { return string(be.AppendUint16(nil, v)) }
func u32(v uint32) string { return string(be.AppendUint32(nil, v)) }
func u64(v uint64) string { return string(be.AppendUint64(nil, v)) }
