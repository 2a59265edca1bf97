// Command hashicorp puts hashicorp/yamux behind the commands of the benchmark suite, which ../../README.md lists.
//
// It is a peer that geyamux is compared with, written as a Go user writes for speed: a goroutine for each stream, one
// write a message, buffers taken from pools or made before the clock starts. It is no test: it judges nothing but the
// counts of bytes. Go takes its number of threads from the CPUs that it is allowed when it starts, so whoever pins it
// does so before. Only what both the library of 2019 (Debian's) and its newest have is used here.
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"

	"github.com/hashicorp/yamux"
)

// The first byte of a stream says what its server does with it.
const (
	kindEcho   = 'e'
	kindSink   = 's'
	kindIdle   = 'i' // a goroutine reads it
	kindHeld   = 'h' // only the session keeps it
	kindSource = 'f'
)

const (
	firstPiece = 4 * 1024
	echoPiece  = 64 * 1024
	bulkPiece  = 256 * 1024
	countSize  = 8
)

// settings go ahead of Yamux on each connection, so that both ends use the same.
type settings struct {
	Window   uint32 `json:"window"`
	AutoTune bool   `json:"auto_tune"`
	MaxFrame *int   `json:"max_frame"` // hashicorp/yamux knows none: a frame is as large as the write and the window
	Write    int    `json:"write"`
	Streams  int    `json:"streams"`
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "hashicorp:", err)
		os.Exit(1)
	}
}

func run(arguments []string) error {
	if len(arguments) == 0 {
		return errors.New("want serve or drive")
	}
	options := flag.NewFlagSet(arguments[0], flag.ExitOnError)
	pem := options.String("tls", "", "serve: certificate and key; drive: whom to trust")
	port := options.Int("port", 0, "drive: the port of 127.0.0.1 to connect to")
	options.Parse(arguments[1:])
	switch arguments[0] {
	case "serve":
		return serve(*pem)
	case "drive":
		return drive(*port, *pem)
	}
	return fmt.Errorf("want serve or drive, not %q", arguments[0])
}

func say(message interface{}) error {
	return json.NewEncoder(os.Stdout).Encode(message)
}

func config(s settings) *yamux.Config {
	c := yamux.DefaultConfig()
	c.MaxStreamWindowSize = s.Window
	// An opener takes its own backlog for that of the other side, so both need the same.
	if s.Streams >= c.AcceptBacklog {
		c.AcceptBacklog = s.Streams + 1
	}
	c.EnableKeepAlive = false
	c.LogOutput = io.Discard
	return c
}
