package main

import (
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"sync"

	"github.com/hashicorp/yamux"
)

// serve returns when standard input ends, which it does too when whoever started this program dies.
func serve(pem string) error {
	listener, err := listen(pem)
	if err != nil {
		return err
	}
	if err := say(map[string]int{"port": listener.Addr().(*net.TCPAddr).Port}); err != nil {
		return err
	}
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go serveConnection(conn)
		}
	}()
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// listen need not set TCP_NODELAY, nor need the driver: Go's net does so on every connection.
func listen(pem string) (net.Listener, error) {
	if pem == "" {
		return net.Listen("tcp", "127.0.0.1:0")
	}
	certificate, err := tls.LoadX509KeyPair(pem, pem)
	if err != nil {
		return nil, err
	}
	return tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{certificate}})
}

func serveConnection(conn net.Conn) {
	defer conn.Close()
	s, err := readSettings(conn)
	if err != nil {
		fmt.Fprintln(os.Stderr, "hashicorp: settings:", err)
		return
	}
	session, err := yamux.Server(conn, config(s))
	if err != nil {
		fmt.Fprintln(os.Stderr, "hashicorp:", err)
		return
	}
	for {
		stream, err := session.AcceptStream()
		if err != nil {
			return
		}
		go serveStream(stream, s.Write)
	}
}

// readSettings reads byte by byte, since Yamux begins right behind the line.
func readSettings(conn net.Conn) (s settings, err error) {
	var line []byte
	next := make([]byte, 1)
	for next[0] != '\n' {
		if _, err = io.ReadFull(conn, next); err != nil {
			return s, err
		}
		line = append(line, next[0])
	}
	err = json.Unmarshal(line, &s)
	return s, err
}

var (
	firstPieces = sync.Pool{New: func() interface{} { return new([firstPiece]byte) }}
	bulkPieces  = sync.Pool{New: func() interface{} { return new([bulkPiece]byte) }}
)

// serveStream reads the kind together with what came behind it, which spares each short stream a read.
func serveStream(stream *yamux.Stream, write int) {
	piece := firstPieces.Get().(*[firstPiece]byte)
	n, err := stream.Read(piece[:])
	kind := piece[0]
	if err != nil || kind == kindIdle || kind == kindHeld {
		// Who is quiet for long keeps no buffer, neither of ours nor of the library's.
		firstPieces.Put(piece)
		stream.Shrink()
		if err == nil && kind == kindIdle {
			err = discard(stream)
		}
		if err != nil {
			stream.Close()
		}
		return
	}
	switch kind {
	case kindEcho:
		echo(stream, piece[:], piece[1:n])
	case kindSink:
		sink(stream, uint64(n-1))
	case kindSource:
		source(stream, piece[1:n], write)
	}
	stream.Close()
	firstPieces.Put(piece)
}

func discard(stream *yamux.Stream) error {
	var rest [1]byte
	for {
		if _, err := stream.Read(rest[:]); err != nil {
			return err
		}
	}
}

// echo starts with a small buffer, since ten thousand streams may each have one, and gets a large one when that fills.
func echo(stream *yamux.Stream, buffer, held []byte) {
	for {
		if _, err := stream.Write(held); err != nil {
			return
		}
		if len(held) == len(buffer) && len(buffer) < echoPiece {
			buffer = make([]byte, echoPiece)
		}
		n, err := stream.Read(buffer)
		if err != nil {
			return
		}
		held = buffer[:n]
	}
}

func sink(stream *yamux.Stream, count uint64) {
	piece := bulkPieces.Get().(*[bulkPiece]byte)
	defer bulkPieces.Put(piece)
	for {
		n, err := stream.Read(piece[:])
		count += uint64(n)
		if err == io.EOF {
			break
		}
		if err != nil {
			return
		}
	}
	stream.Write(binary.BigEndian.AppendUint64(nil, count))
}

func source(stream *yamux.Stream, held []byte, write int) {
	size := make([]byte, countSize)
	n := copy(size, held)
	if _, err := io.ReadFull(stream, size[n:]); err != nil {
		return
	}
	left := binary.BigEndian.Uint64(size)
	for piece := make([]byte, write); left > 0; left -= uint64(len(piece)) {
		if left < uint64(len(piece)) {
			piece = piece[:left]
		}
		if _, err := stream.Write(piece); err != nil {
			return
		}
	}
}
